"""Human fetal atlas (Cao et al. 2020, Science 370:eaba7721; GEO GSE156793) as in CountsDiff.

python data_prep/fetal.py survey_of_human_embryonic_development.h5ad fetal.zarr
distdiff train --config fetal.yaml          # CountsDiff's settings; needs a GPU

The h5ad is that of cellxgene.cziscience.com, collection "Survey of human embryonic development" (4,062,980 cells), with
raw counts in ``raw`` or, where it has none, in ``X``. As in CountsDiff: genes that 100,000 cells have, of these the
1,000 with the largest coefficient of variation (over training cells here, over all cells there); no cell is dropped;
labels cell type, disease, sex, batch, day of development; 80, 10 and 10 % of the cells. A part of the atlas needs
another --min-cells.
"""

from __future__ import annotations

from collections.abc import Sequence

from _recipe import one_file, run

LABELS = {
    "cell type": ("cell_type", "Main_cluster_name"),
    "disease": ("disease",),
    "sex": ("sex",),
    "batch": ("batch", "Experiment_batch", "Fetus_id", "donor_id"),
    "day of development": ("development_day", "development_stage", "age"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    one_file(__doc__, arguments, config="fetal", names=LABELS, genes="cv:1000", min_cells=100_000)


if __name__ == "__main__":
    run(main)
