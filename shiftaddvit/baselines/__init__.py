"""The systems the method is compared with, applied like recipes."""
