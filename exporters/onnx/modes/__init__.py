"""The modes of an export: merged, one adapter as inputs, a bank with slots."""
