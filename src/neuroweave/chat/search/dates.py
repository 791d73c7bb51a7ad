"""Dates as web pages, documents and search engines write them."""

from __future__ import annotations

import datetime
import re
from email.utils import parsedate_to_datetime

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
ISO = re.compile(r"(?<!\d)(\d{4})-(\d{1,2})-(\d{1,2})(?!\d)")
PDF = re.compile(r"^D:(\d{4})(\d{2})(\d{2})")
DAY_FIRST = re.compile(r"(?<!\d)(\d{1,2})(?:st|nd|rd|th)?\.?\s+([A-Za-z]{3,9})\.?,?\s+(\d{4})(?!\d)")
MONTH_FIRST = re.compile(r"\b([A-Za-z]{3,9})\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(\d{4})(?!\d)")
UPDATED = re.compile(r"\blast (?:updated|modified|changed|revised)(?: on)?:?\s+(.{6,40})", re.IGNORECASE)


def parse_date(text: str | None) -> datetime.date | None:
    """The day in `2026-05-12T...`, `D:20260512...`, `12 May 2026`, `May 12, 2026` or a mail header's date; None where
    there is none, or none such (a day before a month in figures alone could be either)."""
    text = (text or "").strip()[:200]
    if match := PDF.match(text) or ISO.search(text):
        return day(match[1], match[2], match[3])
    if match := DAY_FIRST.search(text):
        return day(match[3], match[2], match[1])
    if match := MONTH_FIRST.search(text):
        return day(match[3], match[1], match[2])
    try:
        return parsedate_to_datetime(text).date()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def day(year: str, month: str, number: str) -> datetime.date | None:
    try:
        in_year = int(month) if month.isdigit() else MONTHS.index(month[:3].lower()) + 1
        return datetime.date(int(year), in_year, int(number))
    except (ValueError, OverflowError):
        return None


def updated_date(text: str) -> datetime.date | None:
    """The day of the last "Last updated on ..." in a text."""
    dates = [parse_date(match[1]) for match in UPDATED.finditer(text)]
    return next((found for found in reversed(dates) if found), None)
