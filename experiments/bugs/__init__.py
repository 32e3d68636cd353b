"""Mistakes that programs were published with, to be measured beside what is right."""

from jaxformer.model.masks import Bidirectional


class Unmasked(Bidirectional):
    """A token sees all of its document, though the mask calls itself causal: so an objective does not refuse it."""

    causal = True
