"""What a build found, for people: a page (`html`) and a summary for the terminal (`text`)."""
