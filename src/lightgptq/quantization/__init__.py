"""The main job: streaming a model through the solver, one decoder block at a time."""
