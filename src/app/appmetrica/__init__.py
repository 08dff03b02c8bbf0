"""AppMetrica: product events by receipt time to objects and the warehouse, and exports on request."""
