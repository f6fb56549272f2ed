"""One recogniser per kind of artefact."""
