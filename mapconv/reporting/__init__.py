"""Pictures of a result, drawn without a plotting library."""
