"""The search for settings: what is searched, one trial, and many of them on any number of machines."""
