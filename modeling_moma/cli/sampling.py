# SPDX-License-Identifier: Apache-2.0
"""Flags of sampling that several commands have."""

from ..errors_moma import InputError


# scores times or by numbers beyond these would not be finite
LEAST_TEMPERATURE = 1e-6
MOST_SCALE = 1000


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `ValueError` at a temperature too near to 0, or at flags of sampling without it."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise InputError(f"--temperature {temperature}: it is below {LEAST_TEMPERATURE}; 0 takes the likeliest token.")
    if temperature == 0 and (top_k or top_p < 1):
        flag = f"--top-k {top_k}" if top_k else f"--top-p {top_p:g}"
        raise InputError(
            f"{flag}: nothing is sampled here, where the temperature is 0: give --temperature, such as 1."
        )
