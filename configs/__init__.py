"""Configurations of published rows and small ones; installed as `synco_fast.configs`."""
