"""The asv suite. Every file is thin: what is measured, and how, is in `harness.suite`."""
