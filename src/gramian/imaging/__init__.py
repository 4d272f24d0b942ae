"""Images of computed tomography: geometries of scanners, their projector, and phantoms."""
