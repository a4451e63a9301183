"""Debiased CKA: how similar two layers' activations are. Numerics only.

The work is one Gram matrix per site and batch. All pairs of sites then cost one matrix product, because the unbiased
HSIC of two sites is the inner product of their U-centred Gram matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from causal_compress.errors import DataError, NumericalError

_ROWS = 128  # rows of a Gram matrix computed at a time; what lies below the diagonal is mirrored, not computed
_SMALL_SPREAD = 0.01  # share of the mean square that is variance: below it the mean is taken off before products
_CONSTANT = 1e-12  # the same share: below it float32 holds only rounding
_BLOCK = 64  # inputs that the bootstrap draws together
_BINS = 32  # blocks are summed into so many bins, so that memory does not grow with the number of inputs


def debiased_cka(x: Float[Tensor, "samples p"], y: Float[Tensor, "samples q"]) -> float:
    """Similarity of two layers' activations on the same samples.

    Args:
        x: One row per sample; further dimensions are flattened; need not be centred.
        y: The same samples in the same order; the width may differ.

    Returns:
        Unitless, 0 (unrelated; may be slightly negative) to 1 (equal up to rotation and one scale).

    Raises:
        DataError: fewer than 4 rows, unequal row counts, or constant activations (0/0).
        NumericalError: NaN or infinity in the activations.

    Source: Kornblith et al. 2019, arXiv:1905.00414; debiased as in Nguyen et al. 2021, arXiv:2010.15327, eq. 3.
    Limits: says "same representation", not "same function"; a merge is never accepted on it alone.
    """
    if len(x) != len(y):
        raise DataError(
            "CKA needs the same samples on both sides",
            found=f"{len(x)} and {len(y)} rows",
            wanted="equal numbers of rows, in the same order",
            remedy="pass the activations of one and the same batch",
        )
    products = hsic_products(u_centre(torch.stack([gram_matrix(x), gram_matrix(y)])))
    if not bool((products.diagonal() > 0).all()):
        raise DataError(
            "CKA of constant activations is 0/0",
            found="every sample has the same activation",
            wanted="activations that differ between samples",
            remedy="leave this site out: it carries no information about the input",
        )
    return float(cka_from_products(products)[0, 1])


linear_cka = debiased_cka


def gram_matrix(
    activation: Float[Tensor, "samples ..."], name: str = "activations"
) -> Float[Tensor, "samples samples"]:
    """Inner products of all pairs of samples, in float32, fit to be U-centred.

    Where the mean is large against the spread, float32 would lose the spread. There the mean is taken off the features
    first, which U-centring does not notice; elsewhere that time is saved.

    Args:
        activation: One row per sample; further dimensions are flattened.
        name: Site, for the error message.

    Returns:
        Symmetric; exactly zero where the activations are constant as far as float32 can tell.

    Raises:
        DataError: fewer than 4 rows.
        NumericalError: NaN or infinity in the activations.
    """
    if len(activation) < 4:
        raise DataError(
            "CKA needs more samples",
            found=f"{len(activation)} rows",
            wanted="at least 4; 256 or more to be useful",
            remedy="use larger batches or more calibration inputs",
        )
    rows = activation.detach().flatten(1).float()
    gram = _products(rows)
    total = gram.trace().item()
    if not math.isfinite(total):
        raise NumericalError(
            f"NaN or infinity at {name}",
            found="activations that are not finite",
            wanted="finite float32 numbers",
            remedy="check the weights and the data's normalisation",
        )
    spread = total - gram.sum().item() / len(gram)
    if spread > _SMALL_SPREAD * total:
        return gram
    gram = _products(rows - rows.mean(0))
    return gram if gram.trace().item() > _CONSTANT * total else torch.zeros_like(gram)


def _products(rows: Tensor) -> Tensor:
    gram = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), _ROWS):
        stop = start + _ROWS
        torch.mm(rows[start:stop], rows[start:].T, out=gram[start:stop, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def u_centre(grams: Float[Tensor, "... samples samples"]) -> Float[Tensor, "... samples samples"]:
    """U-centre Gram matrices: rows and columns sum to zero, the diagonal is zero.

    Args:
        grams: Symmetric, at least 4 samples each; their diagonals are not used.

    Returns:
        New float64 matrices.

    Source: Szekely & Rizzo 2014, arXiv:1310.2926, definition 2.
    """
    samples = grams.shape[-1]
    centred = grams.to(torch.float64, copy=True)
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    shares = centred.sum(-1, keepdim=True) / (samples - 2)
    shares -= shares.sum(-2, keepdim=True) / (2 * (samples - 1))
    centred -= shares
    centred -= shares.mT
    centred.diagonal(dim1=-2, dim2=-1).zero_()
    return centred


def hsic_products(
    centred: Float[Tensor, "sites samples samples"], others: Float[Tensor, "sites samples samples"] | None = None
) -> Float[Tensor, "sites sites"]:
    """Unbiased HSIC of every pair of sites, by one matrix product.

    Args:
        centred: U-centred Gram matrices of the same samples.
        others: The second partner of each pair; None: the same sites.

    Source: Song et al. 2012, "Feature selection via dependence maximization", JMLR 13, eq. 5.
    """
    samples = centred.shape[-1]
    rows = centred.flatten(1)
    columns = rows if others is None else others.flatten(1)
    return rows @ columns.T / (samples * (samples - 3))


def cka_from_products(
    products: Float[Tensor, "sites sites"], norms: Float[Tensor, " sites"] | None = None
) -> Float[Tensor, "sites sites"]:
    """CKA of every pair from HSIC sums, divided once at the end.

    Args:
        products: Sums of HSIC over mini-batches.
        norms: Each site's HSIC with itself; None: the diagonal of `products`.

    Returns:
        0 where a site is constant: its CKA is 0/0, and nothing can be said for it.
    """
    norms = products.diagonal() if norms is None else norms
    roots = norms.clamp_min(0).sqrt()
    scale = roots[:, None] * roots[None, :]
    return torch.where(scale > 0, products / scale.where(scale > 0, 1), 0)


@dataclass
class HsicSums:
    """Sums over mini-batches of the HSIC of all pairs of sites, of its row-permuted null, and of its blocks.

    Blocks, of 64 inputs or a little more, are what the bootstrap draws. They are dealt out to at most 32 bins; plain
    and intervened versions of the same inputs go to the same bin, because they are not independent.
    """

    products: Tensor
    null: Tensor
    bins: Tensor
    blocks: int = field(default=0)

    @classmethod
    def zeros(cls, sites: int, device: torch.device) -> HsicSums:
        """Nothing seen yet."""
        products = torch.zeros(sites, sites, dtype=torch.float64, device=device)
        return cls(products, products.clone(), products.expand(_BINS, -1, -1).clone())

    def add(self, versions: list[Float[Tensor, "sites samples samples"]], generator: torch.Generator) -> None:
        """Add one batch.

        Args:
            versions: Gram matrices of all sites for the plain batch and for each intervention on it.
            generator: Draws the permutations of the null, one for each site.
        """
        samples = versions[0].shape[-1]
        blocks = torch.arange(samples).tensor_split(max(1, samples // _BLOCK))
        for grams in versions:
            centred = u_centre(grams)
            self.products += samples * hsic_products(centred)
            self.null += samples * hsic_products(centred, _permuted(centred, generator))
            for number, block in enumerate(blocks, self.blocks):
                rows = slice(int(block[0]), int(block[-1]) + 1)
                self.bins[number % _BINS] += len(block) * hsic_products(u_centre(grams[:, rows, rows]))
        self.blocks += len(blocks)

    def cka(self) -> Float[Tensor, "sites sites"]:
        """CKA of every pair of sites over all that was added."""
        return cka_from_products(self.products)

    def null_cka(self) -> Float[Tensor, "sites sites"]:
        """The same with each site's rows permuted independently: what unrelated activations would read."""
        return cka_from_products(self.null, self.products.diagonal())

    def used_bins(self) -> Float[Tensor, "bins sites sites"]:
        """HSIC sums of the bins that hold anything."""
        return self.bins[: self.blocks]


def _permuted(grams: Tensor, generator: torch.Generator) -> Tensor:
    orders = torch.rand(grams.shape[:2], generator=generator).argsort(1).to(grams.device)
    rows = grams.gather(1, orders[:, :, None].expand_as(grams))
    return rows.gather(2, orders[:, None, :].expand_as(grams))
