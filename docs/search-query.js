/* The search of these pages takes words as they stand, and finds pages in the language of the page it is asked from.

The theme's worker reads signs of a query as commands ("-word" leaves pages out, "word:" names a field), takes every word for the
beginning of one, and has both languages in one index. So what is sent to it is changed on the way: the index before the first
question, and every question. This has to run before the theme's own script, which starts the worker. */

"use strict";

(() => {
  const SETUP = 0, QUERY = 2;  // kinds of messages to the worker
  const chinese = document.documentElement.lang.startsWith("zh");
  const short = word => /^[\w.]{1,3}$/.test(word);
  const send = Worker.prototype.postMessage;

  /** The entries of this language. One whose title is a message in quotation marks goes before a page that has words in common with it. */
  function ours(entries) {
    return entries.filter(entry => entry.location.startsWith("zh-CN/") === chinese)
      .map(entry => entry.title.startsWith("“") ? {...entry, boost: 1.3} : entry);
  }

  /** The words of a query without signs. Short ones beside others are met whole ("^1"): "on" is not the beginning of "only". */
  function words(query) {
    const found = query.split(/[^\p{L}\p{N}.]+/u).filter(Boolean);
    return found.map(word => found.length > 1 && short(word) ? word + "^1" : word).join(" ");
  }

  // A page that was found marks the words of the question: not the short ones, which stand everywhere and inside others.
  const here = new URL(location), marked = here.searchParams.get("h")?.split(" ") ?? [];
  if (!marked.every(short)) {
    here.searchParams.set("h", marked.filter(word => !short(word)).join(" "));
    history.replaceState(history.state, "", here);
  }

  Worker.prototype.postMessage = function (message, ...rest) {
    if (message?.type === SETUP)
      message = {...message, data: {...message.data, docs: ours(message.data.docs)}};
    else if (message?.type === QUERY)
      message = {...message, data: words(message.data)};
    return send.call(this, message, ...rest);
  };
})();
