"""Whether a revision is worse than another: exact counts first, paired ratios second, clocks only for reading."""
