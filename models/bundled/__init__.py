"""The model that the server serves when it is started without one."""
