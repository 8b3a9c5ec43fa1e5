"""The benchmark of segmenting and evaluating, from its flags on."""

from scripts import benchmark_protocols


def test_everything_is_measured_and_equal(shared_data, capsys):
    flags = ["--data", str(shared_data), "--repeats", "1", "--frames", "60", "--long", "300"]
    assert benchmark_protocols.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, start in zip(
        lines,
        (
            "KTS, 60 frames of TVSum: ",
            "KTS, 60 frames of noise: 59 changes, the same; plain ",
            "KTS, 300 frames: ",
            "Knapsack, 1000 summaries of TVSum: ",
            "Evaluation of 50 videos: greatest difference ",
            "Human row: ",
        ),
        strict=True,
    ):
        assert line.startswith(start)
    assert "changes, the same; plain " in lines[0]


def test_data_are_asked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DEEVISUM_DATA", raising=False)
    assert benchmark_protocols.main([]) == 2
    assert "give --data, or set DEEVISUM_DATA" in capsys.readouterr().err
    assert benchmark_protocols.main(["--data", str(tmp_path)]) == 2
    assert "TVSum's annotations are not there" in capsys.readouterr().err
