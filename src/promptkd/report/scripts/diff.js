/* The words of one text that another lacks, by the longest common subsequence of words. */

const MOST_CELLS = 4e6;
const PIECES = /\s+|[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]|[\p{L}\p{N}\p{M}_]+|[^\s]/gu;
const isSpace = (piece) => /^\s/.test(piece);

/* For each word, whether it is in the longest common subsequence of both lists; null where that would take too long. */
const shared = (ours, theirs) => {
  const width = theirs.length + 1;
  if ((ours.length + 1) * width > MOST_CELLS) return null;
  const longest = new Uint16Array((ours.length + 1) * width);
  for (let i = ours.length - 1; i >= 0; i--) {
    for (let j = theirs.length - 1; j >= 0; j--) {
      longest[i * width + j] = ours[i] === theirs[j]
        ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const kept = [new Array(ours.length).fill(false), new Array(theirs.length).fill(false)];
  for (let i = 0, j = 0; i < ours.length && j < theirs.length;) {
    if (ours[i] === theirs[j]) kept[0][i++] = kept[1][j++] = true;
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return kept;
};

/* Text as [piece, marked] in order; a space between two marked words is marked too. */
const marks = (pieces, kept) => {
  let word = 0;
  const marked = pieces.map((piece) => (isSpace(piece) ? null : !kept[word++]));
  return pieces.map((piece, at) => [piece, marked[at] ?? Boolean(marked[at - 1] && marked[at + 1])]);
};

/* Both texts as lists of [piece, whether the other text lacks it], or null for texts too long to compare. */
const wordDifferences = (ours, theirs) => {
  const pieces = [ours, theirs].map((text) => text.match(PIECES) ?? []);
  const kept = shared(...pieces.map((list) => list.filter((piece) => !isSpace(piece))));
  return kept && pieces.map((list, at) => marks(list, kept[at]));
};
