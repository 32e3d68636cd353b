"""Mistakes that programs were published with, to be measured beside what is right."""

from jaxtyping import Array, Float

from jaxformer.model.masks import Bidirectional
from jaxformer.model.residuals import PostNorm, Site


class Unmasked(Bidirectional):
    """A token sees all of its document, though the mask calls itself causal: so an objective does not refuse it."""

    causal = True


class AttentionUnused(PostNorm):
    """x = norm(x) where attention would join: what it gives is used nowhere, so that each token sees itself alone."""

    def after(self, stream: Float[Array, "B T D"], h: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return site.norms[0](stream) if site.branch == "attention" else super().after(stream, h, site)
