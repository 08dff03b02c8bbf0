"""AppMetrica: product events by time of receipt to objects and the warehouse, and exports on request."""
