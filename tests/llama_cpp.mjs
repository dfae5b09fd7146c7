// Asks a real llama.cpp about a GGUF file. By hand: node tests/llama_cpp.mjs RESULT.json < request.json
//
// request: {"model": path, "texts": [string], "prompts": [[token]], "steps": number, "query": string}
// result:  {"tokens": of each text, "greedy": after each prompt,
//           "wrapper", "chat": the prompt that node-llama-cpp, and so QMD, makes of the query}
import fs from "node:fs";
import {getLlama, LlamaLogLevel, resolveChatWrapper} from "node-llama-cpp";

const request = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: request.model});

const tokens = request.texts.map((text) => model.tokenize(text, true));

const wrapper = resolveChatWrapper(model);
const {contextText} = wrapper.generateContextState({
    chatHistory: [
        ...wrapper.generateInitialChatHistory(),
        {type: "user", text: request.query},
        {type: "model", response: []}
    ]
});
const chat = model.detokenize(contextText.tokenize(model.tokenizer), true);

// One thread: several of them spin against each other on a busy machine.
const context = await model.createContext({contextSize: 512, threads: 1});
const sequence = context.getSequence();
const greedy = [];
for (const prompt of request.prompts) {
    await sequence.clearHistory();
    const found = [];
    let input = prompt;
    while (found.length < request.steps) {
        const last = {generateNext: {probabilities: true, options: {temperature: 0}}};
        const output = await sequence.controlledEvaluate([...input.slice(0, -1), [input.at(-1), last]]);
        const [best] = output.at(-1).next.probabilities.keys();
        found.push(best);
        input = [best];
    }
    greedy.push(found);
}

// To a file: a pipe is cut at 64 KB when the process exits.
fs.writeFileSync(process.argv[2], JSON.stringify({tokens, greedy, wrapper: wrapper.wrapperName, chat}));
process.exit(0);
