"""Training: one loop for one process or many, exact under resume."""
