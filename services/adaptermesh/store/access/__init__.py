"""Who may do what: tenants, keys, grants, and the record of what was changed."""
