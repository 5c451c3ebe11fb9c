"""How a stage is computed: one folder per target kind, one module per stage."""
