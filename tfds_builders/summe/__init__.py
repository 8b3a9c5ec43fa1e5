"""SumMe: 25 videos of holidays, events and sports, each summarized by 15 to 18 people."""
