"""The report of `update_geometry`: figures and tables from its finished folders.

`read` loads folders, `figures` and `tables` make the parts, `build` puts them together.
"""
