"""The report: what was quantized, what was not and why, and which kernel runs."""

from qwix._src.report_records import OpRecord, device_bytes, sqnr_db

__all__ = ["OpRecord", "device_bytes", "sqnr_db"]
