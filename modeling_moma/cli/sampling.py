# SPDX-License-Identifier: Apache-2.0
"""Settings of sampling that several commands have."""

from typing import Annotated

from pydantic import Field

from ..errors_moma import InputError
from ..utils.fields import Float, Int
from .arguments import Flag


# scores times or by numbers beyond these would not be finite
LEAST_TEMPERATURE = 1e-6
MOST_SCALE = 1000
Scale = Annotated[Float, Field(ge=0, le=MOST_SCALE)]
TopK = Annotated[Int, Field(ge=0)]
OfSampling = Flag(section="sampling")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `ValueError` at a temperature too near to 0, or at flags of sampling without it."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InputError(
            f"sampling.temperature = {temperature}: it is below {LEAST_TEMPERATURE}; 0 takes the likeliest token."
        )
    if temperature == 0 and (top_k or top_p < 1):
        flag = f"sampling.top_k = {top_k}" if top_k else f"sampling.top_p = {top_p:g}"
        raise InputError(
            f"{flag}: nothing is sampled here, where the temperature is 0: give sampling.temperature, such as 1."
        )
