"""Numbers as a pandas.DataFrame, for those who have pandas: this package does not need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["dataframe"]


def dataframe(rows: Sequence[Mapping[str, Any]]) -> DataFrame:
    """Return rows as a table with a column for each name.

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a DataFrame needs pandas: pip install pandas") from error
    return DataFrame(list(rows))
