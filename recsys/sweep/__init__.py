"""Grids of runs over settings and seeds: `grid` says which, `engine` trains them, `summary` tabulates them."""

from recsys.sweep.engine import Outcome, run_cells
from recsys.sweep.grid import Cell, Grid, make_grid, parse_axis
from recsys.sweep.summary import summarise

__all__ = ["Cell", "Grid", "Outcome", "make_grid", "parse_axis", "run_cells", "summarise"]
