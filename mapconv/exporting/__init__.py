"""Adapters out of mapconv: what each server takes, and one file for each format that is written."""
