from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakePairs
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.folds import assign_folds, leaks, split_samples
from pipeline.data.manifests import Manifest, find_samples, load_manifest, manifest_from_mapping
from pipeline.data.samples import Sample
from pipeline.errors import ConfigurationError, InputErrors

SUBJECTS = st.dictionaries(
    st.text(min_size=1, max_size=6), st.sampled_from([f"s{n}" for n in range(12)]), min_size=6
)
