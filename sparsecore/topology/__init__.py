"""Dynamic topology: allocation, pruning, growth, schedules, the explorer."""
