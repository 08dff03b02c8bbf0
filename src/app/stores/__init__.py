"""Where state and objects are kept: the ports' real implementations, one home per SDK."""
