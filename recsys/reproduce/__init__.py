"""Tables of results as papers print them, from presets to a page: `definition`, `measure`, `page`, `command`."""
