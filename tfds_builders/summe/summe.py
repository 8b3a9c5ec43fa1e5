"""The TFDS builder of SumMe, from the official download.

    builder = build(SumMe, data_dir, "1fps", manual_dir="SumMe")
    records = read(builder, ALL)     # 25 records by name, capitals first

People gave summaries, not scores: `user_summary` holds them, and `user_scores` the same as numbers,
one for every native frame. Shots are the change points of an HDF5 file of the community where one
lies beside the videos, else those of our own KTS; `builder.info.metadata` says which, and what
files all of it was made of.
"""

from __future__ import annotations

import numpy as np

from tfds_builders import annotated
from tfds_builders.summe import annotations


class SumMe(annotated.AnnotatedBuilder):
    """SumMe's videos, or features of them, with its annotations."""

    name = "summe"
    VIDEO_IDS = annotations.VIDEO_IDS
    DESCRIPTION = """
25 videos of holidays, events and sports, 1 to 6 minutes long and raw or hardly edited. 15 to 18
people cut a summary of each, of 5 to 15 % of its length, watching it without sound.
"""
    HOMEPAGE = "https://gyglim.github.io/me/vsum/index.html"
    LICENSE = "For research, as the authors' page says; the videos belong to those who made them."
    CITATION = """
@inproceedings{gygli2014creating,
  title = {Creating Summaries from User Videos},
  author = {Gygli, Michael and Grabner, Helmut and Riemenschneider, Hayko and Van Gool, Luc},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages = {505--520},
  year = {2014},
}
"""
    annotations = annotations
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
Get SumMe.zip (https://gyglim.github.io/me/vsum/index.html; docs/DATA.md says more) and unpack it,
so that there are
  videos/*   25 files, .mp4, .webm or .avi
  GT/*.mat   25 files of the same names
  *.h5       for summe/features: features in the community's HDF5 layout
"""

    @staticmethod
    def annotated(video: annotations.VideoAnnotation) -> annotated.Annotated:
        return annotated.Annotated(
            video_id=video.video_id,
            title=video.video_id.replace("_", " "),
            category="",
            n_frames=video.n_frames,
            length_s=video.length_s,
            longest_s=video.video_duration_s,
            score_times=video.frame_times,
            user_scores=video.user_summary.astype(np.float32),
            frame_scores=None,
            user_summary=video.user_summary,
        )
