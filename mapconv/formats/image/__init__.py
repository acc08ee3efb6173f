"""Dialects of image models' adapters: one weights file without a configuration, whose keys say everything."""
