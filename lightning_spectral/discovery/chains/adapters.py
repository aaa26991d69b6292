"""Read a sum of products that multiply one value: a matrix W and the low-rank adapters beside it, W + B₁A₁ + B₂A₂."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_spectral.discovery.chains.linear import LinearPart
from lightning_spectral.discovery.chains.multipliers import multiplier_factors
from lightning_spectral.discovery.chains.products import (
    STACK,
    Reader,
    WeightProduct,
    matrix_factor,
    rows_read,
    weight_product,
)
from lightning_spectral.discovery.chains.routes import Addend, Route
from lightning_spectral.discovery.trace.operands import UnmeasurableError
from lightning_spectral.discovery.trace.operations import moved_values
from lightning_spectral.discovery.trace.probe import Prober, Region
from lightning_spectral.records import Factor

__all__ = ["summed_matrix"]


def summed_matrix(
    region: Region, prober: Prober, linear: LinearPart, value: int, addends: Sequence[Addend]
) -> tuple[WeightProduct, Factor]:
    """Return the product with the base matrix W, and W as a factor with its adapters.

    Args:
        region: The branch.
        prober: Checks that all terms read the same channels.
        linear: Checks that all terms write the same channels.
        value: The sum.
        addends: Its terms. The first single product without multipliers has the base matrix.

    Raises:
        UnmeasurableError: The terms are no matrices that can be added up, or one cannot be read.
    """
    products = {part: [_product(region, link) for link in part.links] for part in addends}
    base = next((part for part in addends if len(part.links) == 1 and not part.links[0].multipliers), None)
    if base is None:
        raise UnmeasurableError("its matrix is multiplied by a number before an adapter is added to it")
    first = products[base][0]
    for part, chain in products.items():
        if not _is_alike(region, prober, linear, value, first, part, chain):
            raise UnmeasurableError("it is a sum of products that do not read and write the same channels")
    adapters = tuple(_adapter(region, linear, part, products[part]) for part in addends if part is not base)
    return first, replace(matrix_factor(region.tape, first), adapters=adapters)


def _is_alike(
    region: Region,
    prober: Prober,
    linear: LinearPart,
    value: int,
    first: WeightProduct,
    part: Addend,
    chain: Sequence[WeightProduct],
) -> bool:
    """Whether a term reads the rows that the first product reads, and adds its channels in order, row by row."""
    channels = tuple(range(region.tape.shape(value)[first.channel]))
    written = (part.links[0].anchor, chain[0].channel)
    readers = [(value, first.channel), *((product.data, product.channel) for product in chain[:-1])]
    return (
        _reads_alike(region, prober, first, chain[-1])
        and linear.channels(written, readers[0]) == channels
        and all(
            prober.keeps_positions(region, (link.anchor, product.channel), reader)
            for link, product, reader in zip(part.links, chain, readers, strict=True)
        )
    )


def _reads_alike(region: Region, prober: Prober, first: WeightProduct, second: WeightProduct) -> bool:
    """Whether two products multiply the same rows, which each may have moved in its own way."""
    # Compare from the nearest common value on. From a value further up, the moves could depend on other content.
    others = set(moved_values(region.tape, second.data))
    source = next(value for value in moved_values(region.tape, first.data) if value in others)
    return prober.same_rows(region, source, (first.data, first.channel), (second.data, second.channel))


def _product(region: Region, link: Route) -> WeightProduct:
    """Return the product at which a route starts."""
    operation = region.tape.producer(link.anchor)
    assert operation is not None
    return weight_product(region.tape, operation)


def _adapter(region: Region, linear: LinearPart, part: Addend, products: Sequence[WeightProduct]) -> tuple[Factor, ...]:
    """Return the factors of one adapter, multipliers included, the leftmost factor first.

    Raises:
        UnmeasurableError: The adapter has a gain per channel, stacked matrices, or several matrices side by side.
    """
    chain: list[Factor] = []
    for position, (link, product) in enumerate(zip(part.links, products, strict=True)):
        multipliers = tuple(multiplier_factors(region.tape, link.multipliers))
        if any(factor.size is not None for factor in multipliers):
            raise UnmeasurableError("an adapter beside its matrix is multiplied by a gain per channel")
        matrix = matrix_factor(region.tape, product)
        if STACK in matrix.layout:
            raise UnmeasurableError("the adapters of stacked matrices are multiplied in one product")
        if position > 0:
            rows, columns = rows_read(linear, product, link.anchor, Reader.of(products[position - 1]))
            if columns is not None:
                raise UnmeasurableError("an adapter has several matrices side by side")
            matrix = replace(matrix, rows=rows)
        chain += [*multipliers, matrix]
    return tuple(chain)
