"""The workloads that are measured at every commit, and what is measured of them."""
