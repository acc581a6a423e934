"""Results as tables, charts, pages and notebook cells."""
