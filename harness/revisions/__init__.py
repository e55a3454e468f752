"""Measuring any revision: its packages in a folder of their own, and a fresh process that measures what lies there."""
