/* Everything above comes to life here; without a decompressor the page stays as a reader without scripts sees it. */

const start = async () => {
  const { models, charts: training, bias, browser } = JSON.parse(await unpack("page-data"));
  document.documentElement.classList.add("scripted");
  browseRows(browser, models);
  trainingCharts(training, models);
  biasCharts(bias, models);
  distributions(browser, models);
  if (byId("plotly")) {
    await runPlotly();
    startCharts();
  }
};

if (window.DecompressionStream) start();
