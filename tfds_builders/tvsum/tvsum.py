"""The TFDS builder of TVSum, from the official download.

    builder = build(TVSum, data_dir, "1fps", manual_dir="ydata-tvsum50-v1_1")
    records = read(builder, ALL)     # 50 records in the order of the .mat

Scores of `user_scores` are those at every 15th native frame. Shots are the change points of an HDF5
file of the community where one lies beside the videos, else those of our own KTS;
`builder.info.metadata` says which, and what files all of it was made of.
"""

from __future__ import annotations

from tfds_builders import annotated
from tfds_builders.tvsum import annotations


class TVSum(annotated.AnnotatedBuilder):
    """TVSum's videos, or features of them, with its annotations."""

    name = "tvsum"
    VIDEO_IDS = annotations.VIDEO_IDS
    DESCRIPTION = """
50 videos from YouTube, five for each of ten categories of TRECVid's multimedia event detection, 1
to 11 minutes long. 20 people scored every two seconds of each from 1 to 5 for their importance.
"""
    HOMEPAGE = "https://github.com/yalesong/tvsum"
    LICENSE = (
        "Videos and annotations: Creative Commons Attribution 3.0 (CC BY 3.0), "
        "https://creativecommons.org/licenses/by/3.0/, by the authors' README."
    )
    CITATION = """
@inproceedings{song2015tvsum,
  title = {{TVSum}: Summarizing Web Videos Using Titles},
  author = {Song, Yale and Vallmitjana, Jordi and Stent, Amanda and Jaimes, Alejandro},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages = {5179--5187},
  year = {2015},
}
"""
    annotations = annotations
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
Get tvsum50_ver_1_1.tgz (https://github.com/yalesong/tvsum; docs/DATA.md says more), unpack it, and
in its ydata-tvsum50-v1_1 the archives ydata-tvsum50-video.zip and ydata-tvsum50-matlab.zip (or
-data.zip), so that there are
  video/*.mp4
  matlab/ydata-tvsum50.mat   or   data/ydata-tvsum50-anno.tsv and data/ydata-tvsum50-info.tsv
  *.h5                       for tvsum/features: features in the community's HDF5 layout
"""

    @staticmethod
    def annotated(video: annotations.VideoAnnotation) -> annotated.Annotated:
        return annotated.Annotated(
            video_id=video.video_id,
            title=video.title,
            category=video.category,
            n_frames=video.n_frames,
            length_s=video.length_s,
            longest_s=video.length_s,
            score_times=video.point_times,
            user_scores=video.point_scores,
            frame_scores=video.user_scores,
            user_summary=None,
        )
