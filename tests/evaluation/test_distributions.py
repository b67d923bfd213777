# SPDX-License-Identifier: Apache-2.0
"""Frechet distance against closed forms, precision and recall against plain loops."""

import pytest
import torch

from modeling_moma.evaluation.drawings import frechet_distance, precision_recall


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_moments(mean, covariance, number, seed=0):
    """Samples that have exactly this mean and this unbiased covariance."""
    samples = noise(number, len(mean), seed=seed)
    samples = samples - samples.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(samples.T.cov()), samples.T, upper=False).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def symmetric_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def test_covariances_that_do_not_commute_equal_the_matrix_square_root():
    root_one, root_two = noise(5, 5, seed=2), noise(5, 5, seed=3)
    covariances = [root @ root.T + 0.1 * torch.eye(5, dtype=torch.float64) for root in (root_one, root_two)]
    means = noise(2, 5, seed=4)
    first, second = (with_moments(*moments, 60, seed) for seed, moments in enumerate(zip(means, covariances)))
    half = symmetric_root(covariances[0])
    overlap = symmetric_root(half @ covariances[1] @ half).trace()
    traces = sum(covariance.trace() for covariance in covariances)
    expected = (means[0] - means[1]).square().sum() + traces - 2 * overlap
    assert frechet_distance(first.float(), second.float()) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_fewer_images_than_dimensions_equal_the_matrix_square_root():
    first, second = noise(12, 40), 1.5 * noise(9, 40, seed=1) + 0.3
    one, two = first.T.cov(), second.T.cov()
    overlap = symmetric_root(symmetric_root(one) @ two @ symmetric_root(one)).trace()
    expected = (first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * overlap
    # the reference takes roots of eigenvalues that are zero but for rounding
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-5)


def test_a_set_is_at_no_distance_from_itself_and_few_images_lie_farther_apart():
    features = noise(500, 16)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(features, features[torch.randperm(500)] + 2) == pytest.approx(64, rel=1e-9)
    few, many = (frechet_distance(noise(count, 16, seed=1), noise(count, 16, seed=2)) for count in (20, 500))
    assert few > 5 * many > 0


def loop_covered(points, centres, neighbours):
    reach = []
    for index, centre in enumerate(centres):
        distances = sorted((centre - other).norm().item() for place, other in enumerate(centres) if place != index)
        reach.append(distances[neighbours - 1])
    inside = [
        any((point - centre).norm().item() <= limit for centre, limit in zip(centres, reach)) for point in points
    ]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("neighbours, shift", [(1, 0.0), (3, 1.0)])
def test_precision_and_recall_are_those_of_plain_loops(neighbours, shift):
    real, drawn = noise(40, 3), 0.7 * noise(30, 3, seed=1) + shift
    found = precision_recall(real, drawn, neighbours)
    assert found["precision"] == pytest.approx(loop_covered(drawn, real, neighbours))
    assert found["recall"] == pytest.approx(loop_covered(real, drawn, neighbours))


def test_one_kind_of_drawing_is_precise_and_recalls_little():
    real = torch.cat([noise(50, 8), noise(50, 8, seed=1) + 100])
    found = precision_recall(real, real[:50] + 1e-3)
    assert found["precision"] == 1.0 and found["recall"] == pytest.approx(0.5)
    assert precision_recall(real, noise(50, 8) + 1000) == {"precision": 0.0, "recall": 0.0}
    # equal images have no reach of their own, and still cover themselves
    alike = torch.ones(5, 8)
    assert precision_recall(alike, alike) == {"precision": 1.0, "recall": 1.0}


def test_sets_that_are_too_small_or_of_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="1 images"):
        frechet_distance(noise(1, 4), noise(9, 4))
    with pytest.raises(ValueError, match="3 images"):
        precision_recall(noise(9, 4), noise(3, 4))
    with pytest.raises(ValueError, match="D equal"):
        frechet_distance(noise(9, 4), noise(9, 5))
