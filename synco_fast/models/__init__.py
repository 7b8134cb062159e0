"""Encoders, the momentum pair, the queue and batch norm's variants. Nothing here knows a method."""
