"""Strip: what is not needed any more leaves a file, the rest stays as it is. ``planning.plan`` is the way in."""
