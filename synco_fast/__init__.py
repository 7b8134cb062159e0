"""SynCo, MoCHi and MoCo v2 pretraining at the speed of the hardware."""

__version__ = "0.1.0.dev0"
