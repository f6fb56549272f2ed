"""One module per verb: where registry meets layouts, ops and hub. The Python API."""
