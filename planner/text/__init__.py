"""Plans, tables and figures as text."""
