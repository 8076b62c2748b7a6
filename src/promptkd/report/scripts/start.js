/* Starts all of the above; a browser without a decompressor shows the page as it is without scripts. */

const start = async () => {
  const { models, charts: training, bias, prompts, browser } = JSON.parse(await unpack("page-data"));
  document.documentElement.classList.add("scripted");
  browseRows(browser, models);
  trainingCharts(training, models);
  biasCharts(bias, models);
  promptCharts(prompts);
  distributions(browser, models);
  if (byId("plotly")) {
    await runPlotly();
    startCharts();
  }
};

if (window.DecompressionStream) start();
