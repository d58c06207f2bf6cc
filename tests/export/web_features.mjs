// What transformers.js makes of a folder: node web_features.mjs MODULES FOLDER PICTURE TEXT …; one line of JSON.
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder, picture, ...texts] = process.argv.slice(2);
const found = createRequire(`${modules}/`).resolve("@huggingface/transformers");
const hf = await import(pathToFileURL(found).href);
hf.env.allowRemoteModels = false;
hf.env.localModelPath = dirname(folder);
hf.env.useFSCache = false;
const name = basename(folder);
const options = { dtype: "fp32" };

const model = await hf.AutoModel.from_pretrained(name, options);
const tokenizer = await hf.AutoTokenizer.from_pretrained(name);
const processor = await hf.AutoProcessor.from_pretrained(name);
const padding = model.config.model_type === "siglip" ? "max_length" : true;
const words = tokenizer(texts, { padding, truncation: true });
const { pixel_values } = await processor(await hf.RawImage.read(picture));
const both = await model({ ...words, pixel_values });
const said = {
  input_ids: words.input_ids.tolist().map((row) => row.map(Number)),
  text_embeds: both.text_embeds.tolist(),
  image_embeds: both.image_embeds.tolist(),
  logits_per_image: both.logits_per_image.tolist(),
  logits_per_text: both.logits_per_text.tolist(),
};
const alone = {
  clip: [hf.CLIPTextModelWithProjection, hf.CLIPVisionModelWithProjection],
  siglip: [hf.SiglipTextModel, hf.SiglipVisionModel],
}[model.config.model_type];
if (alone) {
  const [text, vision] = await Promise.all(alone.map((kind) => kind.from_pretrained(name, options)));
  const [t, v] = [await text(words), await vision({ pixel_values })];
  said.text_alone = (t.text_embeds ?? t.pooler_output).tolist();
  said.image_alone = (v.image_embeds ?? v.pooler_output).tolist();
}
const classify = await hf.pipeline("zero-shot-image-classification", name, options);
said.answers = await classify(picture, texts, { hypothesis_template: "{}" });
console.log(JSON.stringify(said));
