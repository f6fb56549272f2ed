"""One file per command. Each exports ``command``; the first line of its docstring is the help shown by ``hubtool --help``."""
