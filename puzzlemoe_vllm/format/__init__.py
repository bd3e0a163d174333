"""Shared by the offline tool and the plugin: what a pair word means and how a packed checkpoint is laid out."""
